"""Times or estimates every operator, compiled or on torch's path."""
