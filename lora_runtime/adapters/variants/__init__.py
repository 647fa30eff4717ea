"""The steps of the reduction: what each kind of adapter adds to the plain low-rank one."""
