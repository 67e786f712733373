"""One run: batches, measurements, the folder that it leaves."""
