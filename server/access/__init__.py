"""Who may do what: keys and certificates, tenants and their quotas, at both doors of a server."""
