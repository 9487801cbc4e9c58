"""What several jobs train: the tasks that they hand to the training loop, and what these tasks read and draw."""
