"""Aggregation: tail classes that look alike are put together into super classes.

Step I of Aggregate-and-Disperse (Ma et al., Pattern Recognition 2020, section 3.3.1).
"""

from facelt_ext._super_classes import SuperClasses

__all__ = ["SuperClasses"]
