"""Offline work: jobs of many requests, no request in a hurry, throughput per dollar above all."""
