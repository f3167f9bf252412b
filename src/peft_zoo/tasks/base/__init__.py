"""Parts that all tasks share: settings, configurations of methods, training, reports."""
