"""Build a job from flags: data, model, workers, optimizer, method."""
