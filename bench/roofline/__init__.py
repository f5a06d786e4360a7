"""``python -m bench roofline``: the time of a call that counting predicts for a GPU, by phases."""
