"""The planner's parts: from a model's shape and a GPU type to a launch, and why."""
