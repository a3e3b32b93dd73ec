"""The sans-I/O heart: values, machines and decisions. Nothing here awaits, sends, sleeps, logs or reads a clock."""
