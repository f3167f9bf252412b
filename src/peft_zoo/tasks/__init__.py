"""Fine-tuning tasks on real models and data, for every registered method.

`base` holds what the tasks share; each other package that defines `EXTRA` is one task.
"""
