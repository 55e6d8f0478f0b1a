"""The toolkit for captured graphs: arguments, operator names, one interpreter, ancestry, liveness."""
