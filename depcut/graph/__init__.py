"""The toolkit for captured graphs: arguments, names, ancestry, liveness."""
