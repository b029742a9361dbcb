"""From a config to a trained state: the step, the loop around it, its optimiser, metrics and guard."""
