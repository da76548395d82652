<?php
// Burns ?ms= of CPU, not of time: where the CPUs are shared it takes longer.
require __DIR__ . '/_journal.php';

function burned(): float
{
    $usage = getrusage();
    return $usage['ru_utime.tv_sec'] * 1e3 + $usage['ru_utime.tv_usec'] / 1e3 + $usage['ru_stime.tv_sec'] * 1e3 + $usage['ru_stime.tv_usec'] / 1e3;
}

$end = burned() + times((int) $_GET['ms']);
do {
    for ($i = 0, $x = 1; $i < 2000; $i++) {
        $x = ($x * 31 + $i) % 1000003;
    }
} while (burned() < $end);
echo "burned\n";
