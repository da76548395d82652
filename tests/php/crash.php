<?php
// Kills its own worker: ?when=before the headers, or ?when=after half of the answer (default);
// ?when=exit ends the script there instead.
require __DIR__ . '/_shared.php';

if (($_GET['when'] ?? 'after') !== 'before') {
    header('Content-Type: text/plain');
    header('Content-Length: 4096');
    echo str_repeat('x', 2048);
    while (ob_get_level() > 0) {
        ob_end_flush();
    }
    flush();
}
if (($_GET['when'] ?? '') === 'exit') {
    exit; // A whole FastCGI answer, but shorter than its Content-Length.
}
posix_kill(posix_getpid(), 9); // SIGKILL: the constant is pcntl's, which FPM does not load.
