"""Archived events -> labelled windows.

PURE.
"""
