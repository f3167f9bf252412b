"""Real jobs on real models: each task fine-tunes with any registered method and says what came of it.

`base` holds what the tasks share; every other package here is one task.
"""
