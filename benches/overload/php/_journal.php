<?php
// Notes what became of this execution: whose it was, whether anybody still waited for it when it began, and whether when it ended. One file a process: no
// worker waits for another's line.
$began = microtime(true);
$deadline = (float) $_GET['deadline'];
register_shutdown_function(function () use ($began, $deadline): void {
    $line = sprintf("%s %.6f %.6f %.6f\n", $_GET['id'], $deadline, $began, microtime(true));
    file_put_contents(getenv('EXECUTIONS') . '.' . getmypid(), $line, FILE_APPEND);
});
// A client that has left does not end the script before it has noted that.
ignore_user_abort(true);

/** A pod that is half as fast takes twice as long for everything. */
function times(int $ms): float
{
    return $ms * (float) (getenv('SLOWNESS') ?: 1);
}
