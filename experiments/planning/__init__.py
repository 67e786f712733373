"""What a run would do, without training."""
