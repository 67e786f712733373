"""From flags to a job: data, model, workers, optimizer, method."""
