"""Stands in for fastreid 1.4.0: configuration, head and meta architecture."""
