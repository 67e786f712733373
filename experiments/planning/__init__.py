"""Plan a run without training: its rounds, communication, memory and hours."""
