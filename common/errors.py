"""The one exception for what a user can fix, and the exit code for what a later try may fix."""

TRY_AGAIN = 75  # sysexits.h calls it EX_TEMPFAIL: the same command can work later


class UserError(Exception):
    """Something that the user, or somebody they can ask, has to change.

    As text it is the two lines that `cli.run` prints on stderr. `what` happened and the `hint` are
    full sentences; `code` is the exit code: 1, or TRY_AGAIN.
    """

    def __init__(self, what, hint, code=1):
        super().__init__(what, hint, code)
        self.what, self.hint, self.code = what, hint, code

    def __str__(self):
        return f"error: {self.what}\nhint:  {self.hint}"
