#!/bin/sh
# Init of the guest's root file system. The command line says what to do:
#   ozone.init=shell       a shell on the console; the guest powers off when it ends (the default)
#   ozone.init=commands    carries out one line after the other, without prompt or echo: for tests
#   ozone.init=check       a self-check, one line per result; then powers off
#   ozone.ip=ADDRESS/BITS  address of eth0
#   ozone.ping=ADDRESS     what the check pings
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux

init=shell ip= ping= console=ttyS0
for word in $(cat /proc/cmdline); do
    case $word in
        ozone.init=*) init=${word#ozone.init=} ;;
        ozone.ip=*) ip=${word#ozone.ip=} ;;
        ozone.ping=*) ping=${word#ozone.ping=} ;;
        console=*) console=${word#console=}; console=${console%%,*} ;;
    esac
done
[ -e "/dev/$console" ] || console=ttyS0
exec < "/dev/$console" > "/dev/$console" 2>&1
echo "ozone-guest: root"

mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
hostname ozone-guest
ip link set lo up
if [ -n "$ip" ]; then
    ip link set eth0 up && ip addr add "$ip" dev eth0
fi

# Writes four random MiB, and reads them back from the disk rather than from memory.
check_disk() {
    dd if=/dev/urandom of=/run/sample bs=1M count=4 2> /run/errors &&
        dd if=/run/sample of=/sample bs=1M conv=fsync 2> /run/errors &&
        sync && echo 3 > /proc/sys/vm/drop_caches &&
        cmp /run/sample /sample > /run/errors 2>&1 &&
        rm /sample
}

report() {
    if [ "$2" = 0 ]; then echo "OZONE-CHECK $1 ok"; else echo "OZONE-CHECK $1 FAILED: $3"; fi
}

case $init in
    check)
        check_disk
        report disk $? "$(head -n 1 /run/errors)"
        if [ -n "$ping" ]; then
            answer=$(ping -c 3 -W 2 "$ping" 2>&1)
            report net $? "$(echo "$answer" | tail -n 1)"
        fi
        # Whoever watches answers once it has looked; without an answer the guest ends all the same.
        echo "OZONE-CHECK end"
        read -r -t 20 answer
        [ "$answer" = go ]
        report console $? "read '$answer' instead of 'go'"
        ;;
    commands)
        stty -echo
        echo "ozone-guest: ready"
        while read -r line; do eval "$line"; status=$?; done
        ;;
    *)
        # A session of its own, so that job control works and Ctrl-C reaches what runs.
        setsid -c sh -l
        ;;
esac

sync
mount -o remount,ro / 2> /dev/null
poweroff -f
