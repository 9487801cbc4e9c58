"""What every job shares: outputs, Ray, MLflow, the worker loop, the display. Only here do any of them start."""
