"""The training of all six scripts: the loop, what it saves, says and measures."""
