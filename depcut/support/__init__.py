"""Helpers of all stages: files, codecs, tables, argument checks, private names of libraries."""
