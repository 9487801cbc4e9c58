"""Room two: a `TextImagePair` comes in and is kept, or rejected with a reason."""
