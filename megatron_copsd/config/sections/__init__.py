"""Sections of the settings: each module has the fields of one to three of them and, beside them, ``problems``.

A setting that is wrong by itself is refused by its field's type. What ties it to other settings, or to a file that must
exist, is a rule in ``problems``.
"""
