"""Parts of the cluster report: which rows it shows, what it computes of them, what training would cost, the page."""
