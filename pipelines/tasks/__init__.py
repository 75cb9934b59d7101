"""What workers do: train, craft, score and time; and the form of the metrics. No Ray, no MLflow."""
