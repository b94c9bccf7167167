"""Parts of ``examples/attributes.py``: imbalanced attributes of real faces."""
