"""Bytes that several processes or machines share: the store, jobs in it, locks, timings; no Ray."""
