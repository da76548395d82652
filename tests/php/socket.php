<?php
// Waits on a socket for ?ms=: holds its worker without CPU, and is not cut short by FPM's SIGQUIT as sleep() is.
require __DIR__ . '/_shared.php';

wait_on_socket((int) ($_GET['ms'] ?? 50));
header('Content-Type: text/plain');
echo getenv('COLOUR'), " waited\n";
