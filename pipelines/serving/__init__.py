"""The server of `serve`: requests checked and queued, one worker that owns the models, and the page."""
