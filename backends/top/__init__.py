"""`doherty top`: the view of a running proxy in a terminal, or once as text.

Values become tables in pure modules (`words`, `table`, `panels`, `replicas`, `plain`); `feed` reads
the admin listener, `app` and `sheet` show the tables by Textual, which is an extra.
"""
