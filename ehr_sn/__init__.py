"""Predict disease from incomplete EHR tables, and see which way of handling the gaps works best."""

from importlib.metadata import version

__version__ = version("ehr-sn")
