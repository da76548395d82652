<?php
// The smallest page: kept small because the benchmarks use it.
header('Content-Type: text/plain');
header('X-Colour: ' . getenv('COLOUR'));
echo getenv('COLOUR'), " hello\n";
