"""Parquet files with a column of encoded images."""
