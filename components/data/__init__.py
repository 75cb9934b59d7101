"""Labelled images, the Parquet shards they are stored in, and noise that is keyed per image."""
