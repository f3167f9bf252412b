"""What every task shares: settings, the choice of method, the training pipeline, the report."""
