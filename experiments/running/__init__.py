"""Run a job: its batches, its measurements, and the folder that it writes."""
