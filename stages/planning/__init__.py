"""Measuring for `tinymim plan`."""
