<?php
// An event stream: ?n= events (default: until the connection is aborted), ?ms= between them. A write that fails
// is what ends it, as FPM has no other way to learn that the client has left.
require __DIR__ . '/_shared.php';

set_time_limit(0);
while (ob_get_level() > 0) {
    ob_end_flush();
}
header('Content-Type: text/event-stream');
header('Cache-Control: no-store');
$n = isset($_GET['n']) ? (int) $_GET['n'] : PHP_INT_MAX;
for ($i = 0; $i < $n && !connection_aborted(); $i++) {
    echo 'id: ', $i, "\ndata: ", getenv('COLOUR'), "\n\n";
    flush();
    wait_on_socket((int) ($_GET['ms'] ?? 20));
}
