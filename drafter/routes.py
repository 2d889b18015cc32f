"""Routes: which version of the learned drafter a request uses."""

SHARED_ROUTE = ""
CANARY_ROUTE = "canary"
TENANT_ROUTE, DOMAIN_ROUTE = "tenant:", "domain:"
"""Before the name of the tenant or the domain."""
