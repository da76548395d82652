<?php
// Answers, lets the client go, and works on for ?ms=: on a kept connection this stalls it (php-src#10335).
require __DIR__ . '/_shared.php';

header('Content-Type: text/plain');
echo getenv('COLOUR'), " finished\n";
fastcgi_finish_request();
wait_on_socket((int) ($_GET['ms'] ?? 50));
journal('worked');
