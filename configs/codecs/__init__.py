"""The sections of codecs, and the choice among the targets that they store."""
