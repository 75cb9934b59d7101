"""The commands that judge networks of your own, one module each: `limpid NAME` runs one."""
