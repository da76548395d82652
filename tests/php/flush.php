<?php
// Half an answer, ?ms= of waiting, the other half. ?unbuffered=1 asks the proxy to stream it.
require __DIR__ . '/_shared.php';

header('Content-Type: text/plain');
if (isset($_GET['unbuffered'])) {
    header('X-Accel-Buffering: no');
}
echo "first\n";
while (ob_get_level() > 0) {
    ob_end_flush();
}
flush();
wait_on_socket((int) ($_GET['ms'] ?? 50));
echo "second\n";
