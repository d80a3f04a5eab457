"""One script for each table and figure: run as ``python -m experiments.NAME``."""
