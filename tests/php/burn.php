<?php
// Burns CPU for ?ms=, by the clock: no signal ends it early.
require __DIR__ . '/_shared.php';

$end = hrtime(true) + (int) ($_GET['ms'] ?? 50) * 1000000;
$rounds = 0;
while (hrtime(true) < $end) {
    $rounds++;
}
header('Content-Type: text/plain');
echo getenv('COLOUR'), ' burned ', $rounds > 0 ? 'some' : 'none', "\n";
