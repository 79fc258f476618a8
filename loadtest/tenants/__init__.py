"""Tenants, classes and deadlines over real processes: who gets what when there is not enough."""
