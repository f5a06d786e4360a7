"""``python -m bench first-contact``: what one wants to know of a GPU machine in the first ten minutes."""
